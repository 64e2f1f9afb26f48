/* Ends a file that is included once for each instruction set. */

#undef vec
#undef ROUNDED
#undef NAME
#undef TARGET
#undef V
#undef REGISTERS
#undef WIDE
#undef LOAD_MASKED
#undef STORE_MASKED
