// Every cell, one line each: its name in Python, its struct. A new cell is registered here and nowhere else in C++.
#pragma once

#include "elman.h"
#include "gru.h"
#include "lstm.h"

#define FASTRNN_CELLS(X)              \
  X(lstm, Lstm)                       \
  X(gru, Gru)                         \
  X(gru_reset_before, GruResetBefore) \
  X(rnn_tanh, ElmanTanh)              \
  X(rnn_relu, ElmanRelu)
