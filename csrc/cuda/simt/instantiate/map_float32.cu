#include "map.cuh"

TA_INSTANTIATE_MAPS(float)
