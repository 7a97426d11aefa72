// Operands as the products read them: columns of keys, and for bfloat16 rows of keys too.
#pragma once

#include "positions.h"

namespace dskd {
namespace {

// A block of keys (count, stride), 0 in the padding of channels, as columns from key `start` on. The block lies in one
// tile. kPad divides c_pad, so that fours do; and a pair of bfloat16 moves as one float, whatever number that may be.
template <class Element>
void pack(const Element* block, int64_t stride, int64_t start, int64_t count, int64_t n_pad, int64_t c_pad,
          void* columns) {
  using Unit = std::conditional_t<sizeof(Element) == 2, float, Element>;
  constexpr int64_t kPair = sizeof(Unit) / sizeof(Element);
  const int64_t tile = start / kKeys * kKeys, width = least(kKeys, n_pad - tile), fours = count / 4 * 4;
  const Unit* from = reinterpret_cast<const Unit*>(block);
  Unit* to = reinterpret_cast<Unit*>(static_cast<Element*>(columns) + tile * c_pad) + (start - tile);
  for (int64_t c = 0; c < c_pad / kPair; c += 4) {
    for (int64_t p = 0; p < fours; p += 4)
      transpose<Unit>(from + p * stride / kPair + c, stride / kPair, to + c * width + p, width,
                      [](Unit x) { return x; });
    for (int64_t p = fours; p < count; p++)
      for (int64_t i = 0; i < 4; i++) to[(c + i) * width + p] = from[p * stride / kPair + c + i];
  }
}

// The same of bfloat16 as rows, by pairs of positions.
inline void pack_rows(const uint16_t* block, int64_t stride, int64_t start, int64_t count, int64_t c_pad, void* rows) {
  int64_t p = 0;
  // A key without its pair leaves the other's numbers alone.
  const auto single = [&] {
    uint16_t* to = static_cast<uint16_t*>(rows) + (start + p) / 2 * 2 * c_pad + (start + p) % 2;
    for (int64_t c = 0; c < c_pad; c++) to[2 * c] = block[p * stride + c];
    p++;
  };
  if (start % 2 == 1 && count > 0) single();
  for (; p + 2 <= count; p += 2) {
    const uint16_t *even = block + p * stride, *odd = even + stride;
    uint32_t* to = static_cast<uint32_t*>(rows) + (start + p) / 2 * c_pad;
    for (int64_t c = 0; c < c_pad; c++) to[c] = even[c] | static_cast<uint32_t>(odd[c]) << 16;
  }
  if (p < count) single();
}

}  // namespace
}  // namespace dskd
