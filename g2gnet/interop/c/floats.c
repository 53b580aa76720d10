typedef float wide;
#define within(x) (x)
#define times(x, by) ((x) * (by))
#define SCALED(of, sum) (sum)
