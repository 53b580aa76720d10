/* W = gamma W + a U + b S, U = beta U + I - W, and a reset. */
static void adlif(const population *of, value *u, value *w, const value *current) {
    for (unsigned i = 0; i < of->size; i++) {
        const value theta = THRESHOLD(of, i);
        const int fired = u[i] > theta;
        const value before = fired && of->reset == ZERO ? 0 : u[i];
        w[i] = within(times(w[i], PARAMETER(of, 2, i)) + times(before, PARAMETER(of, 3, i)) + (fired ? PARAMETER(of, 4, i) : 0));
        const wide next = times(before, PARAMETER(of, 1, i)) + ((wide)current[i] - w[i]);
        u[i] = within(fired && of->reset == SUBTRACT ? next - theta : next);
    }
}
