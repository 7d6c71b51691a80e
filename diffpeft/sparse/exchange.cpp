// The loop of exchange.py. Compiled when it is first needed.

#include <cstdint>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

// Entries between the one that is reached and the one that is fetched; measured on one CPU.
constexpr int64_t AHEAD = 128;

// `Exchange` of exchange.py, by addresses and sizes.
struct Exchange {
  void* tensor;
  int64_t numel;
  const int64_t* back_at;
  int64_t back_count;
  const void* back;
  const int64_t* at;
  int64_t count;
  const float* values;
  void* old;
};

// Calls `visit(i, at[i])` for each i in turn, and tells for how many: not from one on that is no place in the tensor.
template <typename T, typename F>
static int64_t each(const T* tensor, int64_t numel, const int64_t* at, int64_t count, F visit) {
  for (int64_t i = -AHEAD; i < count; i++) {
    if (i + AHEAD < count) {
      int64_t next = at[i + AHEAD];
      if ((uint64_t)next >= (uint64_t)numel) return i < 0 ? 0 : i;
      __builtin_prefetch(tensor + next, 1);
    }
    if (i >= 0) visit(i, at[i]);
  }
  return count;
}

// Makes the exchanges from `*progress` on, and counts them there, until one has a place that its tensor does not have.
template <typename T>
static void exchange(const Exchange* rows, int64_t n, int64_t* progress) {
  for (; *progress < n; ++*progress) {
    const Exchange& row = rows[*progress];
    T *tensor = (T*)row.tensor, *old = (T*)row.old;
    const T* back = (const T*)row.back;
    const float* values = row.values;
    int64_t written = each(tensor, row.numel, row.back_at, row.back_count, [=](int64_t i, int64_t place) {
      tensor[place] = back[i];
    });
    if (written < row.back_count) return;
    int64_t made = each(tensor, row.numel, row.at, row.count, [=](int64_t i, int64_t place) {
      T entry = tensor[place];
      old[i] = entry;
      tensor[place] = (T)(entry + values[i]);
    });
    if (made < row.count) {
      while (made--) tensor[row.at[made]] = old[made];
      return;
    }
  }
}

extern "C" {
void exchange_float32(const Exchange* rows, int64_t n, int64_t* progress) { exchange<float>(rows, n, progress); }
void exchange_float64(const Exchange* rows, int64_t n, int64_t* progress) { exchange<double>(rows, n, progress); }
void exchange_float16(const Exchange* rows, int64_t n, int64_t* progress) { exchange<c10::Half>(rows, n, progress); }
void exchange_bfloat16(const Exchange* rows, int64_t n, int64_t* progress) { exchange<c10::BFloat16>(rows, n, progress); }
}
