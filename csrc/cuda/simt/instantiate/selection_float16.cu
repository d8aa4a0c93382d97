#include "selection.cuh"

TA_INSTANTIATE_SELECTION(Float16)
