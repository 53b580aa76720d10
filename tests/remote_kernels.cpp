// Calls functions of a library for another process, which may be of another processor or system: tests/remote_kernels.py.
//
// A request on standard input: the function's name; pieces of memory; places in them that hold addresses in pieces, or
// of what the library has made; and the arguments. The answer: what the function returned, and those pieces that it may
// have written, with the other process's own addresses. Numbers are little-endian, as on both sides.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#if defined(_WIN32)
#include <fcntl.h>
#include <io.h>
#include <windows.h>
#else
#include <dlfcn.h>
#endif

namespace {

enum Kind : uint64_t { kNumber, kAddress, kScratch, kText };
constexpr uint64_t kOwn = ~uint64_t{0};  // in place of a piece: an address of this process

#if defined(_WIN32)
HMODULE open(const char* file) {
    _setmode(_fileno(stdin), _O_BINARY), _setmode(_fileno(stdout), _O_BINARY);
    return LoadLibraryA(file);
}
void* find(HMODULE library, const char* name) { return reinterpret_cast<void*>(GetProcAddress(library, name)); }
#else
void* open(const char* file) { return dlopen(file, RTLD_NOW); }
void* find(void* library, const char* name) { return dlsym(library, name); }
#endif

void read(void* to, size_t size) {
    if (size && std::fread(to, 1, size, stdin) != size) std::exit(0);  // the other process has ended
}

uint64_t number() {
    uint64_t value;
    read(&value, sizeof value);
    return value;
}

void write(const void* from, size_t size) { std::fwrite(from, 1, size, stdout); }

// Memory, of which parts without a number but 0 are not sent, so that those of gigabytes need not exist.
struct Piece {
    uint64_t written, size;
    std::unique_ptr<char, decltype(&std::free)> memory;

    Piece() : written(number()), size(number()), memory(static_cast<char*>(std::calloc(size + 1, 1)), &std::free) {
        if (!memory) std::exit((std::fprintf(stderr, "%llu bytes cannot be had\n", static_cast<unsigned long long>(size)), 1));
        while (const uint64_t length = number()) {
            const uint64_t from = number();
            read(memory.get() + from, length);
        }
    }
};

}  // namespace

int main(int, char** argv) {
    const auto library = open(argv[1]);
    if (!library) return std::fprintf(stderr, "%s cannot be loaded\n", argv[1]), 1;
    for (;;) {
        const uint64_t returned = number();
        std::string name(number(), '\0');
        read(name.data(), name.size());
        std::vector<Piece> pieces(number());
        struct Place {
            char* at;
            char theirs[8];
        };
        std::vector<Place> places(number());
        for (auto& place : places) {
            const uint64_t piece = number(), at = number(), of = number(), offset = number();
            place.at = pieces[piece].memory.get() + at;
            std::memcpy(place.theirs, place.at, 8);
            const uint64_t target = of == kOwn ? offset : reinterpret_cast<uint64_t>(pieces[of].memory.get() + offset);
            std::memcpy(place.at, &target, 8);
        }
        std::vector<char> scratch;
        uint64_t arguments[8] = {};
        for (uint64_t i = 0, count = number(); i < count; ++i) {
            const uint64_t kind = number(), value = number(), offset = number();
            arguments[i] = value;
            if (kind == kAddress) arguments[i] = reinterpret_cast<uint64_t>(pieces[value].memory.get() + offset);
            if (kind == kScratch) {
                scratch.resize(value + 64);
                arguments[i] = (reinterpret_cast<uint64_t>(scratch.data()) + 63) / 64 * 64;
            }
        }
        using Function = uint64_t (*)(uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t);
        const auto function = reinterpret_cast<Function>(find(library, name.c_str()));
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
            for (const auto& piece : pieces)
                if (piece.written) write(piece.memory.get(), piece.size);
        }
        std::fflush(stdout);
    }
}
