# kvmix_flags(target): warnings, sanitizers and hidden symbols for one of our targets.
function(kvmix_flags target)
  # include/kvmix/export.h shows what is public. CUDA sources take the flag for what their host compiler makes.
  set_target_properties(${target} PROPERTIES CXX_VISIBILITY_PRESET hidden CUDA_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON)
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wshadow -Wnon-virtual-dtor -Wcast-align -Wunused -Woverloaded-virtual -Wpedantic>
    $<$<AND:$<BOOL:${KVMIX_WERROR}>,$<COMPILE_LANGUAGE:CXX>>:-Werror>)
  if(KVMIX_SANITIZE)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${KVMIX_SANITIZE} -fno-omit-frame-pointer -fno-sanitize-recover=all>)
    # A bare comma would separate arguments of the generator expression.
    string(REPLACE "," "$<COMMA>" list "${KVMIX_SANITIZE}")
    target_link_options(${target} PUBLIC $<HOST_LINK:-fsanitize=${list}>)
  endif()
endfunction()

# kvmix_isa_flags(): compiler flags for sources named after an instruction set, *_avx2.cc and so on. Dispatch is at run time.
function(kvmix_isa_flags)
  set(avx2 -mavx2 -mfma -mf16c)
  set(avxvnni ${avx2} -mavxvnni)
  set(avx512vnni ${avx2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vbmi -mavx512vnni)
  set(avx512bf16 ${avx512vnni} -mavx512bf16)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 14)
    # GCC's own intrinsics headers trip these two (GCC PR 105593).
    list(APPEND avx512vnni -Wno-maybe-uninitialized -Wno-uninitialized)
    list(APPEND avx512bf16 -Wno-maybe-uninitialized -Wno-uninitialized)
  endif()
  foreach(source IN LISTS ARGN)
    if(source MATCHES "_(avx2|avxvnni|avx512vnni|avx512bf16)\\.cc$")
      set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "${${CMAKE_MATCH_1}}")
    endif()
  endforeach()
endfunction()
