// Calls functions of a library for another process, which may be of another processor: tests/remote_kernels.py.
//
// A request on standard input: the function's name; pieces of memory; places in them that hold addresses in pieces; and
// the arguments. The answer: what the function returned, and the pieces as it left them, with the other process's own
// addresses. Numbers are little-endian, as on both sides.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace {

enum Kind : uint64_t { kNumber, kAddress, kScratch, kText };

void read(void* to, size_t size) {
    if (size && std::fread(to, 1, size, stdin) != size) std::exit(0);  // the other process has ended
}

uint64_t number() {
    uint64_t value;
    read(&value, sizeof value);
    return value;
}

void write(const void* from, size_t size) { std::fwrite(from, 1, size, stdout); }

}  // namespace

int main(int, char** argv) {
    void* library = dlopen(argv[1], RTLD_NOW);
    if (!library) return std::fprintf(stderr, "%s\n", dlerror()), 1;
    for (;;) {
        const uint64_t returned = number();
        std::string name(number(), '\0');
        read(name.data(), name.size());
        std::vector<std::vector<char>> pieces(number());
        for (auto& piece : pieces) {
            piece.resize(number());
            read(piece.data(), piece.size());
        }
        struct Place {
            char* at;
            char theirs[8];
        };
        std::vector<Place> places(number());
        for (auto& place : places) {
            const uint64_t piece = number(), at = number(), of = number(), offset = number();
            place.at = pieces[piece].data() + at;
            std::memcpy(place.theirs, place.at, 8);
            const char* target = pieces[of].data() + offset;
            std::memcpy(place.at, &target, 8);
        }
        std::vector<char> scratch;
        uint64_t arguments[8] = {};
        for (uint64_t i = 0, count = number(); i < count; ++i) {
            const uint64_t kind = number(), value = number(), offset = number();
            arguments[i] = value;
            if (kind == kAddress) arguments[i] = reinterpret_cast<uint64_t>(pieces[value].data() + offset);
            if (kind == kScratch) {
                scratch.resize(value + 64);
                arguments[i] = (reinterpret_cast<uint64_t>(scratch.data()) + 63) / 64 * 64;
            }
        }
        using Function = uint64_t (*)(uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t);
        const auto function = reinterpret_cast<Function>(dlsym(library, name.c_str()));
        if (!function) return std::fprintf(stderr, "there is no %s\n", name.c_str()), 1;
        const auto& a = arguments;
        const uint64_t result = function(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]);
        if (returned == kText) {
            const auto* text = reinterpret_cast<const char*>(result);
            const uint64_t length = std::strlen(text);
            write(&length, sizeof length);
            write(text, length);
        } else {
            write(&result, sizeof result);
            for (const auto& place : places) std::memcpy(place.at, place.theirs, 8);
            for (const auto& piece : pieces) write(piece.data(), piece.size());
        }
        std::fflush(stdout);
    }
}
