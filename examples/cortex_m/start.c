/* The vectors of a Cortex-M: its stack, and where newlib begins. */
extern char __stack[], _start[];

__attribute__((section(".vectors"), used)) static char *const vectors[] = {__stack, _start};
