/* U = beta U + I, after a reset by the threshold or to 0. */
static void lif(const population *of, value *u, value *unused, const value *current) {
    (void)unused;
    for (unsigned i = 0; i < of->size; i++) {
        const value theta = THRESHOLD(of, i);
        const int fired = u[i] > theta;
        const wide next = times(fired && of->reset == ZERO ? 0 : u[i], PARAMETER(of, 1, i)) + current[i];
        u[i] = within(fired && of->reset == SUBTRACT ? next - theta : next);
    }
}
