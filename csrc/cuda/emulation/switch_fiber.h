// Fibers of the System V x86-64 ABI: a switch saves the callee-saved registers and changes the stack pointer.
#pragma once
#include <cstdint>

#if !defined(__x86_64__)
#error "The GPU emulator switches fibers in x86-64 assembly; other processors are not supported."
#endif

namespace mls::emu {

// Saves the running fiber's stack pointer in *save and continues the fiber whose stack pointer is `target`.
extern "C" void mls_switch_fiber(void** save, void* target);

inline void switch_fiber(void** save, void* target) {
  mls_switch_fiber(save, target);
}

void enter_fiber();

// The stack pointer of a fiber that will start in enter_fiber().
inline void* new_fiber(unsigned char* stack_end) {
  auto** stack = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack_end) & ~uintptr_t{63});
  *--stack = nullptr;  // return address of enter_fiber(), which never returns
  *--stack = reinterpret_cast<void*>(&enter_fiber);
  return stack - 6;  // six callee-saved registers, whose initial values do not matter
}

}  // namespace mls::emu
