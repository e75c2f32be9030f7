# Targets `llama` and `ggml::ggml`. An installed llama.cpp is taken if there is one; otherwise the pinned release is obtained
# from the Python package index (package llama-cpp-python, whose source archive carries llama.cpp), checked by hash, and built
# once into a cache folder outside the build tree: $KVMIX_CACHE_DIR, or kvmix in $XDG_CACHE_HOME or ~/.cache.
set(KVMIX_LLAMA_PACKAGE 0.3.36)
set(KVMIX_LLAMA_SHA256 832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e)
option(KVMIX_SYSTEM_LLAMA "Use an installed llama.cpp if find_package(llama) finds one" ON)

if(DEFINED ENV{KVMIX_CACHE_DIR})
  set(kvmix_cache_dir $ENV{KVMIX_CACHE_DIR})
elseif(DEFINED ENV{XDG_CACHE_HOME})
  set(kvmix_cache_dir $ENV{XDG_CACHE_HOME}/kvmix)
else()
  set(kvmix_cache_dir $ENV{HOME}/.cache/kvmix)
endif()

function(kvmix_run what)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE status OUTPUT_FILE ${kvmix_cache_dir}/llama-build.log
                  ERROR_FILE ${kvmix_cache_dir}/llama-build.err)
  if(NOT status EQUAL 0)
    file(READ ${kvmix_cache_dir}/llama-build.err tail)
    message(FATAL_ERROR "${what} failed (${status}); logs in ${kvmix_cache_dir}/llama-build.{log,err}\n${tail}")
  endif()
endfunction()

function(kvmix_build_llama prefix)
  find_package(Python3 REQUIRED COMPONENTS Interpreter)
  set(work ${kvmix_cache_dir}/llama-work)
  set(archive ${kvmix_cache_dir}/llama_cpp_python-${KVMIX_LLAMA_PACKAGE}.tar.gz)
  if(NOT EXISTS ${archive})
    message(STATUS "llama.cpp: obtaining llama-cpp-python ${KVMIX_LLAMA_PACKAGE} (77 MB)")
    kvmix_run("pip download" ${Python3_EXECUTABLE} -m pip download --quiet --no-deps --no-binary :all:
              --dest ${kvmix_cache_dir} llama-cpp-python==${KVMIX_LLAMA_PACKAGE})
  endif()
  file(SHA256 ${archive} hash)
  if(NOT hash STREQUAL KVMIX_LLAMA_SHA256)
    message(FATAL_ERROR "${archive} has SHA-256 ${hash}, expected ${KVMIX_LLAMA_SHA256}: delete it and configure again")
  endif()
  message(STATUS "llama.cpp: building once into ${prefix} (a few minutes)")
  file(REMOVE_RECURSE ${work})
  file(ARCHIVE_EXTRACT INPUT ${archive} DESTINATION ${work} PATTERNS "*/vendor/llama.cpp/*")
  set(source ${work}/llama_cpp_python-${KVMIX_LLAMA_PACKAGE}/vendor/llama.cpp)
  kvmix_run("configuring llama.cpp" ${CMAKE_COMMAND} -G ${CMAKE_GENERATOR} -S ${source} -B ${work}/build
            -DCMAKE_BUILD_TYPE=Release -DCMAKE_C_COMPILER=${CMAKE_C_COMPILER} -DCMAKE_CXX_COMPILER=${CMAKE_CXX_COMPILER}
            -DCMAKE_INSTALL_PREFIX=${prefix}.part -DCMAKE_INSTALL_LIBDIR=lib -DCMAKE_POSITION_INDEPENDENT_CODE=ON
            -DBUILD_SHARED_LIBS=OFF -DGGML_NATIVE=ON -DGGML_OPENMP=ON -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TESTS=OFF
            -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF)
  kvmix_run("building llama.cpp" ${CMAKE_COMMAND} --build ${work}/build --parallel)
  kvmix_run("installing llama.cpp" ${CMAKE_COMMAND} --install ${work}/build)
  file(RENAME ${prefix}.part ${prefix})
  file(REMOVE_RECURSE ${work})
endfunction()

if(KVMIX_SYSTEM_LLAMA)
  find_package(llama QUIET GLOBAL)
endif()
if(NOT llama_FOUND)
  # The build is for this processor and compiler, so the folder's name says which.
  set(identity "${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION} ${CMAKE_SYSTEM_PROCESSOR}")
  if(EXISTS /proc/cpuinfo)
    file(STRINGS /proc/cpuinfo flags REGEX "^flags" LIMIT_COUNT 1)
    string(APPEND identity "${flags}")
  endif()
  string(MD5 identity "${identity}")
  string(SUBSTRING ${identity} 0 8 identity)
  set(llama_prefix ${kvmix_cache_dir}/llama-${KVMIX_LLAMA_PACKAGE}-${identity})
  file(MAKE_DIRECTORY ${kvmix_cache_dir})
  file(LOCK ${kvmix_cache_dir}/llama.lock GUARD FILE TIMEOUT 1800)
  if(NOT EXISTS ${llama_prefix})
    kvmix_build_llama(${llama_prefix})
  endif()
  file(LOCK ${kvmix_cache_dir}/llama.lock RELEASE)
  # The package files are relocatable; they find the prefix they stand in.
  find_package(ggml REQUIRED GLOBAL PATHS ${llama_prefix} NO_DEFAULT_PATH)
  find_package(llama REQUIRED GLOBAL PATHS ${llama_prefix} NO_DEFAULT_PATH)
endif()
