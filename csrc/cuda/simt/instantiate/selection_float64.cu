#include "selection.cuh"

TA_INSTANTIATE_SELECTION(double)
