"""Sources of the C++ and CUDA C++ kernels, which `dskd_fast.backends.native_build` builds."""
