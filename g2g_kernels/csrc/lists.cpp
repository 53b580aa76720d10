#include "lists.h"

#include <numeric>

#include "plan.h"

namespace g2g {
namespace {

// The neuron of a unit's row or column number `offset`, −1 in its padding.
int32_t neuron(const Side& side, int32_t unit, int32_t offset) {
    const int32_t place = side.bounds[unit] + offset;
    return place < side.bounds[unit + 1] ? static_cast<int32_t>(side.order[place]) : -1;
}

// The finalizer of SplitMix64: every bit of the number changes each bit of the result with a probability of a half.
uint64_t mixed(uint64_t x) {
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

constexpr uint64_t kStep = 0x9E3779B97F4A7C15u;  // of the places, so that the order counts

}  // namespace

Lists* build_lists(const Side& rows, const Side& cols, const int32_t* unit_row, const int32_t* unit_col, int32_t units,
                   int32_t by_rows, int32_t length) {
    if (length < 1 || !valid(rows, cols, unit_row, unit_col, units)) return nullptr;
    Lists made;
    made.owners = by_rows ? rows.size : cols.size;
    made.others = by_rows ? cols.size : rows.size;
    made.ranges = (made.others - 1) / length + 1;
    made.length = (made.others - 1) / made.ranges + 1;
    const auto list = [&](int32_t owner, int32_t other) { return int64_t{other / made.length} * made.owners + owner; };
    // f(index in the packed values, owner, other) of every weight, in the order of those values
    const auto each = [&](const auto& f) {
        for (int32_t slot = 0; slot < units; ++slot)
            for (int32_t r = 0; r < rows.width; ++r) {
                const int32_t row = neuron(rows, unit_row[slot], r);
                for (int32_t c = 0; row >= 0 && c < cols.width; ++c) {
                    const int32_t col = neuron(cols, unit_col[slot], c);
                    if (col >= 0) f((slot * rows.width + r) * cols.width + c, by_rows ? row : col, by_rows ? col : row);
                }
            }
    };
    // sorted by the other neuron, then stably by the list
    std::vector<int64_t> of_other(int64_t{made.others} + 1, 0), of_list(int64_t{made.ranges} * made.owners + 1, 0);
    each([&](int32_t, int32_t owner, int32_t other) { ++of_list[list(owner, other)], ++of_other[other]; });
    std::exclusive_scan(of_list.begin(), of_list.end(), of_list.begin(), int64_t{0});
    made.first = std::move(of_list);
    const int64_t entries = made.first.back();
    struct Entry {
        int32_t place, owner;
    };
    std::vector<Entry> sorted(entries);
    std::exclusive_scan(of_other.begin(), of_other.end(), of_other.begin(), int64_t{0});
    const std::vector<int64_t>& begin = of_other;  // whose last one is the number of entries
    std::vector<int64_t> next = begin;
    each([&](int32_t place, int32_t owner, int32_t other) { sorted[next[other]++] = {place, owner}; });
    const bool narrow = length <= 1 << 16;
    if (narrow)
        made.narrow.resize(entries);
    else
        made.wide.resize(entries);
    made.place.resize(entries);
    next = made.first;
    for (int32_t other = 0; other < made.others; ++other)
        for (int64_t i = begin[other]; i < begin[other + 1]; ++i) {
            const int64_t at = next[list(sorted[i].owner, other)]++;
            if (narrow)
                made.narrow[at] = static_cast<uint16_t>(other % made.length);
            else
                made.wide[at] = other % made.length;
            made.place[at] = sorted[i].place;
        }
    made.fingerprint = fingerprint(rows, cols, unit_row, unit_col, units);
    return new Lists(std::move(made));
}

uint64_t fingerprint(const Side& rows, const Side& cols, const int32_t* unit_row, const int32_t* unit_col, int32_t units) {
    uint64_t sum = mixed(units);
    for (int32_t i = 0; i < units; ++i)
        sum += mixed((uint64_t{static_cast<uint32_t>(unit_row[i])} << 32 | static_cast<uint32_t>(unit_col[i])) + kStep * i);
    for (const Side* side : {&rows, &cols}) {
        sum = mixed(sum + side->size) + mixed((uint64_t{static_cast<uint32_t>(side->num_units)} << 32) + side->width);
        for (int32_t i = 0; i < side->size; ++i) sum += mixed(side->order[i] + kStep * (i + 1));
        for (int32_t i = 0; i <= side->num_units; ++i) sum += mixed(~uint64_t{static_cast<uint32_t>(side->bounds[i])} + kStep * i);
    }
    return sum;
}

uint64_t digest(const uint32_t* words, int64_t first, int64_t last) {
    uint64_t sum = 0;
    const auto add = [&](uint64_t one, uint64_t other, int64_t place) {  // both halves of a product, as wyhash mixes
        const auto product = static_cast<unsigned __int128>(one + kStep * (place + 1)) * (other ^ 0xA0761D6478BD642Fu);
        sum += static_cast<uint64_t>(product >> 64) ^ static_cast<uint64_t>(product);
    };
    uint64_t pair[2];
    for (; first + 4 <= last; first += 4) {  // parts begin at multiples of 4
        __builtin_memcpy(pair, words + first, sizeof pair);
        add(pair[0], pair[1], first);
    }
    for (; first < last; ++first) add(words[first], first, first);
    return sum;
}

}  // namespace g2g
