#include "map.cuh"

TA_INSTANTIATE_MAPS(Float16)
