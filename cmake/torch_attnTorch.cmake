# The torch that torch_attn links, as the target torch_attn::torch. Used by the library's own build and, installed beside
# torch_attnConfig.cmake, by its consumers, so that both agree on what "linking torch" means.
#
# Not find_package(Torch): with a CUDA build of torch that looks for a whole CUDA toolkit, which neither needs.

# torch_attn_add_torch(<folder of torch> <variable for its release> <variable for an error, empty when all is well>)
function(torch_attn_add_torch torch_dir release_variable error_variable)
  set(${error_variable} "" PARENT_SCOPE)
  if(NOT EXISTS "${torch_dir}/include/torch/library.h" OR NOT EXISTS "${torch_dir}/lib/libtorch_cpu.so")
    set(${error_variable} "There is no torch in the folder \"${torch_dir}\"." PARENT_SCOPE)
    return()
  endif()
  include("${torch_dir}/share/cmake/Torch/TorchConfigVersion.cmake")
  set(${release_variable} "${PACKAGE_VERSION}" PARENT_SCOPE)

  if(NOT TARGET torch_attn::torch)
    add_library(torch_attn::torch INTERFACE IMPORTED GLOBAL)
    target_include_directories(torch_attn::torch SYSTEM INTERFACE
                               "${torch_dir}/include" "${torch_dir}/include/torch/csrc/api/include")
    target_link_libraries(torch_attn::torch INTERFACE "${torch_dir}/lib/libtorch.so" "${torch_dir}/lib/libtorch_cpu.so"
                                                      "${torch_dir}/lib/libc10.so")
    # torch has been built with libstdc++'s current ABI alone since 2.7; some distributions' compilers default to the old.
    target_compile_definitions(torch_attn::torch INTERFACE _GLIBCXX_USE_CXX11_ABI=1)
    target_compile_features(torch_attn::torch INTERFACE cxx_std_20)
  endif()
endfunction()
