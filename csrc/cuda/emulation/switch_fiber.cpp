#include "cuda/emulation/switch_fiber.h"

asm(R"(
.text
.globl mls_switch_fiber
.type mls_switch_fiber,@function
mls_switch_fiber:
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
.size mls_switch_fiber, .-mls_switch_fiber
)");
