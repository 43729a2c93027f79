#include "../gpu/backward_launch.cuh"
