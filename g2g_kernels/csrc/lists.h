// Weights in lists, for masks whose 64 × 64 tiles would be mostly empty: memory and time follow the weights, whatever the
// size of the matrix.
#pragma once

#include <cstdint>
#include <vector>

#include "structures.h"

namespace g2g {

// Numbers of neurons within a range, of 16 bits or of 32.
struct Numbers {
    const uint16_t* narrow;
    const int32_t* wide;  // where narrow is null
    int32_t operator[](int64_t e) const { return narrow ? narrow[e] : wide[e]; }
    const void* at(int64_t e) const { return narrow ? static_cast<const void*>(narrow + e) : wide + e; }
    Numbers from(int64_t e) const { return {narrow ? narrow + e : nullptr, narrow ? nullptr : wide + e}; }
};

// The weights of a mask one by one. The neurons of one side, the *others*, are cut into ranges; weights lie by the range of the other
// neuron, then by the neuron on this side, the *owner*, then by the other one.
struct Lists {
    int32_t owners = 0, others = 0;
    int32_t length = 0, ranges = 0;  // others of a range, and how many ranges there are
    std::vector<int64_t> first;    // [ranges · owners + 1] into the entries
    std::vector<uint16_t> narrow;  // [entries] the neuron on the other side, from the first of its range on; ascending within a list;
    std::vector<int32_t> wide;     //   in one of the two
    std::vector<int32_t> place;    // [entries] index of the weight in the packed values
    uint64_t fingerprint = 0;      // of the mask they were built from
    int64_t entries() const { return static_cast<int64_t>(place.size()); }
    Numbers other() const { return {narrow.empty() ? nullptr : narrow.data(), wide.data()}; }
    // Where the lists of all owners in a range begin: that of owner n ends where that of n + 1 begins.
    const int64_t* of_range(int32_t range) const { return first.data() + int64_t{range} * owners; }
};

// The others in as few ranges as `length` allows, of equal length; up to 65,536 they have 16 bits. Returns nullptr if an index is out of
// range.
Lists* build_lists(const Side& rows, const Side& cols, const int32_t* unit_row, const int32_t* unit_col, int32_t units,
                   int32_t by_rows, int32_t length);

// What a population sends in all steps of each sample, as lists.
struct SampleSpikes {
    std::vector<int32_t> counts;   // [T]
    std::vector<int32_t> neurons;  // those of each step, ascending
    std::vector<char> values;      // of gradient events: U − θ, floats or doubles
};
struct Spikes {
    std::vector<SampleSpikes> of;  // [populations · samples]
};

// 64 bits that another mask has with a probability of 2⁻⁶⁴: a mask's buffers change in place, and a copy of them to compare
// would take as much memory as the lists.
uint64_t fingerprint(const Side& rows, const Side& cols, const int32_t* unit_row, const int32_t* unit_col, int32_t units);

// The same of numbers, for words first … last − 1 of them, to be added up over parts.
uint64_t digest(const uint32_t* words, int64_t first, int64_t last);

}  // namespace g2g
