# Toolchain file: builds for AArch64 on another machine, and runs what it built in an emulator (make test-aarch64).
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
find_program(GEMMA_NORM_QEMU qemu-aarch64)
if(NOT GEMMA_NORM_QEMU)
  message(FATAL_ERROR "qemu-aarch64 runs the tests; Debian: apt-get install qemu-user")
endif()
set(CMAKE_CROSSCOMPILING_EMULATOR ${GEMMA_NORM_QEMU} -L /usr/aarch64-linux-gnu)
