# The emulator, and what ../../CMakeLists.txt compiles against it in place of CUDA's runtime.
set(module _emulated)
set(runtime emulation)

if(TILEWISE_SANITIZER STREQUAL "plain")
  set(instrumented -fsanitize=alignment,bounds)  # reported by undefined.cpp
elseif(TILEWISE_SANITIZER STREQUAL "address")
  set(instrumented -fsanitize=address,undefined -fno-sanitize-recover=undefined)
  set(linked ${instrumented})
  list(APPEND instrumented -Wno-maybe-uninitialized)  # its checks hide from GCC what is set
elseif(TILEWISE_SANITIZER STREQUAL "thread")
  set(instrumented -fsanitize=thread)
  set(linked ${instrumented})
elseif(TILEWISE_SANITIZER STREQUAL "memory")
  # Every access calls a function: instrumented.cpp has them, not ThreadSanitizer's library.
  set(instrumented -fsanitize=thread,alignment,bounds)
  set(linked -Wl,--wrap=memcpy,--wrap=memmove,--wrap=memset)
else()
  message(FATAL_ERROR "TILEWISE_SANITIZER: must be plain, address, thread or memory, "
                      "got ${TILEWISE_SANITIZER}")
endif()

# Compiled once for all that is linked against it: without sanitizers, and without calls of memcpy
# where there is none in the source.
file(GLOB_RECURSE emulator CONFIGURE_DEPENDS csrc/emulation/*.cpp)
add_library(runtime STATIC EXCLUDE_FROM_ALL ${emulator})
target_include_directories(runtime PRIVATE csrc csrc/emulation/include)
string(TOUPPER TILEWISE_${TILEWISE_SANITIZER} sanitizer)
target_compile_definitions(runtime PRIVATE ${sanitizer})
target_compile_options(runtime PRIVATE
  -O2 -Wall -Wextra -Werror -fno-strict-aliasing -fno-tree-loop-distribute-patterns)

if(NOT TILEWISE_RUNTIME)
  set(TILEWISE_RUNTIME runtime)
endif()
add_library(emulation INTERFACE)
target_include_directories(emulation INTERFACE csrc csrc/emulation/include)
target_link_libraries(emulation INTERFACE ${TILEWISE_RUNTIME} ${CMAKE_DL_LIBS})
target_link_options(emulation INTERFACE ${linked})

# Kernels read the same bytes as several types. Pragmas are nvcc's, and what only they use unused.
set(device -g -O1 -fno-strict-aliasing -ffp-contract=off -fno-omit-frame-pointer
  -Wno-unknown-pragmas -Wno-unused-variable ${instrumented})
set(warnings -Wall -Wextra -Werror ${device})
set_source_files_properties(${kernels} ${units} PROPERTIES LANGUAGE CXX)

if(TILEWISE_PROGRAM)
  add_executable(program EXCLUDE_FROM_ALL ${TILEWISE_PROGRAM})
  set_source_files_properties(${TILEWISE_PROGRAM} PROPERTIES LANGUAGE CXX)
  target_compile_options(program PRIVATE ${device})
  target_link_libraries(program PRIVATE emulation)
endif()
