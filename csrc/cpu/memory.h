// What the backend asks of the operating system's memory.
#pragma once

#include <stddef.h>

namespace fastrnn::cpu {

// Asks for huge pages inside [p, p + bytes), if there is room for some. Only a hint: the memory stays the caller's.
void prefer_huge_pages(void* p, size_t bytes);

}  // namespace fastrnn::cpu
