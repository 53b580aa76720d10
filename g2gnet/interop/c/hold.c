
/* The product of a held input is the same at every step. */
static void hold(${prefix}_state *s, const input_value *input) {
    for (int p = 0; p < POPULATIONS; p++) {
        const population *of = &populations[p];
        value *drive = s->drive + of->state;
        if (of->input != 1) continue;
        receive(s, p, input);
        for (unsigned i = 0; i < of->size; i++) drive[i] = within((wide)drive[i] + SCALED(of, s->sums[i]));
    }
}
