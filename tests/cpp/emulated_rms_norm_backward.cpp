#include "device/emulated.h"
#include "gpu/backward_launch.cuh"
