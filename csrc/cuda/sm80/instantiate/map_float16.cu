#include "map.cuh"

TA_INSTANTIATE_SM80_MAPS(Float16)
