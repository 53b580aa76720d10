/* C = gamma C + I, U = beta U + C, and a reset. */
static void synaptic(const population *of, value *u, value *c, const value *current) {
    for (unsigned i = 0; i < of->size; i++) {
        const value theta = THRESHOLD(of, i);
        const int fired = u[i] > theta;
        c[i] = within(times(c[i], PARAMETER(of, 2, i)) + current[i]);
        const wide next = times(u[i], PARAMETER(of, 1, i)) + c[i];
        u[i] = fired && of->reset == ZERO ? 0 : within(fired && of->reset == SUBTRACT ? next - theta : next);
    }
}
