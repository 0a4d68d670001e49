#include "fiber.h"

#include <cstring>

#ifdef __x86_64__
extern "C" void shim_switch(void** save, void* load);
asm(R"(
.text
.globl shim_switch
.type shim_switch, @function
shim_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size shim_switch, .-shim_switch
)");
#endif

namespace shim {
namespace {
Context* left = nullptr;  // the context that was switched away from last

void finish(Context* self) {
#ifdef __SANITIZE_ADDRESS__
    const void* bottom;
    std::size_t bytes;
    __sanitizer_finish_switch_fiber(self ? self->fake_stack : nullptr, &bottom, &bytes);
    if (!left->stack) {
        left->bottom = bottom;
        left->bytes = bytes;
    }
#else
    (void)self;
#endif
}
}  // namespace

void prepare(Context& to, void (*entry)()) {
    if (!to.stack) to.stack = std::malloc(SHIM_STACK_BYTES);
    to.bottom = to.stack;
    to.bytes = SHIM_STACK_BYTES;
    to.fake_stack = nullptr;
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(to.stack, SHIM_STACK_BYTES);
#endif
#ifdef __x86_64__
    // As after a call: the entry, popped by ret, leaves the stack 8 bytes off a multiple of 16.
    auto top = (reinterpret_cast<std::uintptr_t>(to.stack) + SHIM_STACK_BYTES) & ~std::uintptr_t(15);
    auto** slots = reinterpret_cast<void**>(top) - 8;
    std::memset(slots, 0, 8 * sizeof(void*));
    slots[6] = reinterpret_cast<void*>(entry);
    to.pointer = slots;
#else
    getcontext(&to.context);
    to.context.uc_stack.ss_sp = to.stack;
    to.context.uc_stack.ss_size = SHIM_STACK_BYTES;
    to.context.uc_link = nullptr;
    makecontext(&to.context, entry, 0);
#endif
}

void switch_to(Context& from, Context& to) {
    left = &from;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.bytes);
#endif
#ifdef __x86_64__
    shim_switch(&from.pointer, to.pointer);
#else
    swapcontext(&from.context, &to.context);
#endif
    finish(&from);
}

void arrived() { finish(nullptr); }

}  // namespace shim
