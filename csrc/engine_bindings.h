#pragma once

#include <pybind11/pybind11.h>

namespace var_fast {

void bind_engine(pybind11::module_& m);

}  // namespace var_fast
