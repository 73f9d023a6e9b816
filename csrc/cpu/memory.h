// What the backend asks of the operating system's memory.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace fastrnn::cpu {

// Asks for huge pages inside [p, p + bytes), if there is room for some. Only a hint: the memory stays the caller's.
void prefer_huge_pages(void* p, size_t bytes);

// Bytes of the cache that a core has to itself (L2), 256 KB to 2 MB; 1 MB if the system does not tell.
int64_t cache_of_a_core();

}  // namespace fastrnn::cpu
