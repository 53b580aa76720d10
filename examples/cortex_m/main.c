/* Prints the outputs of the network for some images; on a Cortex-M also the instructions of one image. */
#include <inttypes.h>
#include <stdio.h>

#include "images.h"
#include "network.h"

#ifdef __arm__
/* SysTick counts down; in qemu with -icount shift=0 an instruction takes 1 ns, and a tick of 25 MHz is 40 of them */
#define SYSTICK ((volatile uint32_t *)0xE000E010)
static void start_count(void) { SYSTICK[1] = 0xFFFFFF, SYSTICK[2] = 0, SYSTICK[0] = 5; }
static unsigned long counted(void) { return (0xFFFFFF - SYSTICK[2]) * 40ul; }
#endif

static g2g_state state;

int main(void) {
    static g2g_input image[G2G_SAMPLE];
    g2g_value answer[G2G_OUTPUTS];
    for (unsigned n = 0; n < IMAGES; n++) {
        for (int i = 0; i < G2G_SAMPLE; i++) image[i] = images[n][i];
#ifdef __arm__
        start_count();
#endif
        g2g_run(&state, image, answer);
#ifdef __arm__
        fprintf(stderr, "%lu\n", counted());
#endif
        for (int i = 0; i < G2G_OUTPUTS; i++) printf("%" PRId32 "%c", answer[i], i + 1 < G2G_OUTPUTS ? ' ' : '\n');
    }
    return 0;
}
