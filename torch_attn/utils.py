"""Where this package's files are, for those who build C++ against it; named as in torch.utils."""

import torch.utils

from ._library import PACKAGE_DIR

# For CMAKE_PREFIX_PATH, as the list that CMake reads: where find_package(torch_attn) finds this package, and torch.
cmake_prefix_path = f"{PACKAGE_DIR / 'share' / 'cmake'};{torch.utils.cmake_prefix_path}"
