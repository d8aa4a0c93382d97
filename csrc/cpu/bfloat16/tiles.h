// The tile products of the instruction set being compiled: on AMX's tile registers, or by `vdpbf16ps` on vectors. Both
// read the same layouts. Included by the other files of this folder.
#pragma once

#if defined(__AMX_BF16__)
#include "amx_tiles.h"
#else
#include "dot_tiles.h"
#endif
