/* $title */
#include "$header"

#include <string.h>

typedef ${prefix}_value value;
typedef ${prefix}_input input_value;
typedef $weight_type weight;
typedef $place_type place; /* of a weight */
typedef $delay_type delay;
typedef $gap_type gap; /* between targets */
$arithmetic
enum { SUBTRACT, ZERO, NONE };
enum { POPULATIONS = $populations, CONNECTIONS = $connections, OUTPUT = $output, INPUT = -1 };

typedef struct {
    int source, target;
    unsigned sources;
    const weight *weights; /* by source */
    const place *first;    /* of each source: its first weight */
    const gap *gaps;       /* to the target of each weight from that of the one before; or of runs: gap and length */
    const uint16_t *list;  /* of each source: which list of runs it has; 0: there are none */
    const place *lists;    /* where each list of runs begins */
    const delay *delays;   /* of each source, in steps; 0: none */
} connection;

typedef struct population {
    unsigned size, state, second, ring, depth; /* places in the arrays of the state, and the steps of the ring */
    int reset, input; /* input: 0 does not reach it, 1 does so at once, 2 with delays */$scales
    void (*charge)(const struct population *, value *, value *, const value *);
    const value *bias;
    const value *parameters[5]; /* threshold, beta, and the model's own */
    uint8_t each[5];            /* whether there is one for each neuron */
} population;

#define PARAMETER(of, k, i) ((of)->parameters[k][(of)->each[k] ? (i) : 0])
#define THRESHOLD(of, i) PARAMETER(of, 0, i)

/* Adds the weights that leave a source, times x, to the currents of their targets. */
static void add(const connection *by, unsigned source, value x, value *to) {
    place at = by->first[source];
    if (!by->list) {
        for (; at < by->first[source + 1]; at++) {
            to += by->gaps[at];
            *to += $weight * x;
        }
        return;
    }
    place run = by->lists[by->list[source]];
    const place end = by->lists[by->list[source] + 1];
    for (; run < end; run += 2) {
        to += by->gaps[run];
        for (unsigned n = by->gaps[run + 1]; n; n--, at++) *to++ += $weight * x;
    }
}

$models
/* --- the network --- */

$constants
static const connection connections[CONNECTIONS] = {
$connection_table
};

static const population populations[POPULATIONS] = {
$population_table
};

/* --- a step --- */

/* What reaches population p of an input, before scaling: s->sums. */
static void receive(${prefix}_state *s, int p, const input_value *input) {
    memset(s->sums, 0, populations[p].size * sizeof(value));
    for (int c = 0; c < CONNECTIONS; c++) {
        const connection *by = &connections[c];
        if (by->target != p || by->source != INPUT) continue;
        for (unsigned j = 0; j < by->sources; j++) {
            const input_value *x = input + j % ${PREFIX}_INPUTS;
$late            if ($x) add(by, j, $x, s->sums);
        }
    }
}
$hold
static void advance(${prefix}_state *s, const input_value *input, int held) {
$remember    for (int p = 0; p < POPULATIONS; p++) {
        const population *of = &populations[p];
        value *current = s->arriving + of->ring + s->at[p] * of->size, *u = s->states + of->state;
        const int receives = of->input == 2 || (of->input == 1 && !held);
        unsigned spikes = 0;
        if (receives) receive(s, p, input);
        for (unsigned i = 0; i < of->size; i++) {
            const value drive = receives ? within((wide)s->drive[of->state + i] + SCALED(of, s->sums[i])) : s->drive[of->state + i];
            current[i] = within(drive + (wide)current[i]$left);
        }
        of->charge(of, u, s->states + of->second, current);
        memset(current, 0, of->size * sizeof(value));
        for (unsigned i = 0; i < of->size; i++)
            if ($fires) s->spikes[spikes++] = ($spike_type)i;
        for (int c = 0; c < CONNECTIONS; c++) {
            const connection *by = &connections[c];
            const population *to = &populations[by->target];
            if (by->source != p) continue;
            for (unsigned n = 0; n < spikes; n++) {
                const unsigned j = s->spikes[n], late = by->delays ? by->delays[j] : 0;
                add(by, j, 1, s->arriving + to->ring + (s->at[by->target] + late) % to->depth * to->size);
            }
        }
        if (p == OUTPUT) $read
    }
    /* a ring moves on only now: populations before and after p count from the same step */
    for (int p = 0; p < POPULATIONS; p++) s->at[p] = (uint16_t)((s->at[p] + 1) % populations[p].depth);
$forget}

void ${prefix}_reset(${prefix}_state *s) {
    memset(s, 0, sizeof *s);
    for (int p = 0; p < POPULATIONS; p++) memcpy(s->drive + populations[p].state, populations[p].bias, populations[p].size * sizeof(value));
$lowest}

void ${prefix}_step(${prefix}_state *s, const ${prefix}_input *input) { advance(s, input, 0); }

void ${prefix}_run(${prefix}_state *s, const ${prefix}_input *sample, ${prefix}_value *answer) {
    ${prefix}_reset(s);
$run    for (int i = 0; i < ${PREFIX}_OUTPUTS; i++) answer[i] = s->answer[i];
}
