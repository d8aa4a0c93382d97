#include "map.cuh"

TA_INSTANTIATE_MAPS(BFloat16)
