// Fibers: a stack each, and a switch between them (assembly on x86-64, ucontext elsewhere).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#ifndef __x86_64__
#include <ucontext.h>
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define SHIM_STACK_BYTES (256 * 1024)
#else
#define SHIM_STACK_BYTES (64 * 1024)
#endif

namespace shim {

// What can be switched to: a fiber with a stack of its own, or the system thread that called the first one.
struct Context {
    Context() = default;
    Context(const Context&) = delete;
    ~Context() { std::free(stack); }

    void* stack = nullptr;
    const void* bottom = nullptr;
    std::size_t bytes = 0;
    void* fake_stack = nullptr;
#ifdef __x86_64__
    void* pointer = nullptr;
#else
    ucontext_t context;
#endif
};

// Makes `to` run from the start of entry(), which must never return.
void prepare(Context& to, void (*entry)());
// Parks the running context in `from` and goes on in `to`.
void switch_to(Context& from, Context& to);
// The first thing that a fiber's entry() does.
void arrived();

}  // namespace shim
