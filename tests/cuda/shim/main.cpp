// Runs recorded launches as a program of its own, so that sanitizers need not be loaded into Python.
//
// usage: PROGRAM INPUT OUTPUT. Numbers are 64 bits, little-endian. Input: the number of buffers, for each its
// size and bytes; the number of launches, for each: length and bytes of the name, grid, block size, shared
// bytes, seed, number of arguments, for each its buffer (or -1) and its value (or the offset in the buffer).
// Output: the buffers' bytes, one after another. Each buffer is allocated apart, so that a sanitizer sees
// accesses beside it.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

extern "C" const char* shim_launch(const char* name, long long grid, long long size, long long shared_bytes,
                                   const std::uint64_t* args, int count, unsigned seed);

namespace {
std::FILE* input;

void read(void* to, std::size_t bytes) {
    if (bytes && std::fread(to, 1, bytes, input) != bytes) {
        std::fprintf(stderr, "the input is too short\n");
        std::exit(2);
    }
}

std::int64_t number() {
    std::int64_t value;
    read(&value, sizeof value);
    return value;
}
}  // namespace

int main(int argc, char** argv) {
    if (argc != 3 || !(input = std::fopen(argv[1], "rb"))) return 2;
    std::vector<std::pair<char*, std::size_t>> buffers((std::size_t)number());
    for (auto& [data, bytes] : buffers) {
        bytes = (std::size_t)number();
        data = nullptr;
        if (posix_memalign(reinterpret_cast<void**>(&data), 64, bytes ? bytes : 1)) return 2;
        read(data, bytes);
    }
    for (std::int64_t launches = number(); launches > 0; --launches) {
        std::string name((std::size_t)number(), ' ');
        read(name.data(), name.size());
        std::int64_t grid = number(), size = number(), shared_bytes = number(), seed = number();
        std::vector<std::uint64_t> args((std::size_t)number());
        for (auto& arg : args) {
            std::int64_t buffer = number(), value = number();
            arg = buffer < 0 ? (std::uint64_t)value
                             : reinterpret_cast<std::uint64_t>(buffers[(std::size_t)buffer].first + value);
        }
        const char* failure = shim_launch(name.c_str(), grid, size, shared_bytes, args.data(),
                                          (int)args.size(), (unsigned)seed);
        if (failure) {
            std::fprintf(stderr, "%s: %s\n", name.c_str(), failure);
            return 1;
        }
    }
    std::FILE* output = std::fopen(argv[2], "wb");
    if (!output) return 2;
    for (auto& [data, bytes] : buffers) {
        if (std::fwrite(data, 1, bytes, output) != bytes) return 2;
        std::free(data);
    }
    return std::fclose(output) ? 2 : 0;
}
