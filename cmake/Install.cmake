# cmake --install: headers, libraries and a package for find_package(kvmix).
include(CMakePackageConfigHelpers)
if(BUILD_SHARED_LIBS)
  install(TARGETS kvmix_shared EXPORT kvmixTargets)
else()
  install(TARGETS kvmix_core EXPORT kvmixTargets)
endif()
# The engine is not part of the package; its headers would promise what cannot be linked.
install(DIRECTORY include/kvmix DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} PATTERN "engine.h" EXCLUDE PATTERN "eval.h" EXCLUDE
        PATTERN "measure.h" EXCLUDE)
install(EXPORT kvmixTargets NAMESPACE kvmix:: DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/kvmix)
configure_package_config_file(cmake/kvmixConfig.cmake.in ${CMAKE_CURRENT_BINARY_DIR}/kvmixConfig.cmake
  INSTALL_DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/kvmix)
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/kvmixConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/kvmixConfig.cmake ${CMAKE_CURRENT_BINARY_DIR}/kvmixConfigVersion.cmake
  DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/kvmix)
if(TARGET kvmix)
  install(TARGETS kvmix)
endif()
