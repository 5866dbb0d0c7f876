# Fails where an object file of one instruction set defines code that files of others may be linked to: functions that
# the linker merges (weak ones) must be of its own namespace. Variables: NM, ISA, OBJECTS.
foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND "${NM}" --defined-only "${object}" OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[^\n]* [Wu] [^\n]*" merged "${symbols}")
  string(LENGTH "${ISA}" length)
  foreach(symbol IN LISTS merged)
    if(NOT symbol MATCHES "hpctrain${length}${ISA}")
      message(SEND_ERROR "${object} defines ${symbol}: let the compiler inline it, or do without it")
    endif()
  endforeach()
endforeach()
