typedef int64_t wide;
#if (-1 >> 1) != -1
#error "shifts of negative numbers have to be arithmetic"
#endif

/* A state in fixed point stays where 32 bits hold it. */
static value within(wide x) { return (value)(x > $largest ? $largest : x < -$largest ? -$largest : x); }
/* A state times a decay or a coupling of $decay_bits bits behind the point. */
static wide times(value x, value by) { return ((wide)x * by + $half) >> $decay_bits; }
#define SCALED(of, sum) (((wide)(sum) * (of)->multiplier + (of)->half) >> (of)->right)
