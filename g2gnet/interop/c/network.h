/* $title */
#ifndef ${PREFIX}_H
#define ${PREFIX}_H

#include <stdint.h>

#define ${PREFIX}_INPUTS $inputs /* values of a step */
#define ${PREFIX}_SAMPLE $sample /* values of a sample: $of_sample */
#define ${PREFIX}_OUTPUTS $outputs
#define ${PREFIX}_STEPS $steps
#define ${PREFIX}_INPUT_SCALE $input_scale /* what an input of 1 counts in the network */

typedef $input_type ${prefix}_input; /* $of_input */
typedef $value_type ${prefix}_value; /* $of_value */

typedef struct {
    ${prefix}_value states[$states]; /* of each population: membranes$second */
    ${prefix}_value arriving[$arriving]; /* of each population: currents of this step and of those that delays reach */
    ${prefix}_value drive[$neurons]; /* what reaches each neuron at every step */
    ${prefix}_value sums[$widest];
    ${prefix}_input history[$history]; /* inputs that delays still read */
    ${prefix}_value answer[${PREFIX}_OUTPUTS]; /* of each output $of_answer */
$total    uint16_t at[$positions]; /* places of now: in the rings of each population, and in the history */
    $spike_type spikes[$widest]; /* numbers of neurons */
} ${prefix}_state;

#define ${PREFIX}_STATE_BYTES sizeof(${prefix}_state)

/* Before the first step. */
void ${prefix}_reset(${prefix}_state *s);
/* One time step of INPUTS values; s->answer is that since the reset. */
void ${prefix}_step(${prefix}_state *s, const ${prefix}_input *input);
/* A whole sample, from a reset on; answer: OUTPUTS values. */
void ${prefix}_run(${prefix}_state *s, const ${prefix}_input *sample, ${prefix}_value *answer);

#endif
