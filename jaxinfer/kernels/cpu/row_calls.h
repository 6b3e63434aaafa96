// Rows of tables and of logits as XLA calls them.

ffi::Error take(ffi::AnyBuffer table, ffi::Buffer<ffi::S32> ids, ffi::Result<ffi::AnyBuffer> out) {
  const auto shape = table.dimensions();
  if (shape.size() != 2 || shape[0] < 1) return wrong("jaxinfer_take: the table must be [V, D]");
  const int64_t row = table.size_bytes() / shape[0];
  for (int64_t i = 0; i < (int64_t)ids.element_count(); i++) {
    const int64_t id = std::clamp<int64_t>(ids.typed_data()[i], 0, shape[0] - 1);
    std::memcpy((char*)out->untyped_data() + i * row, (const char*)table.untyped_data() + id * row, row);
  }
  return ffi::Error::Success();
}

ffi::Error argmax(ffi::ThreadPool pool, Floats x, ffi::Result<Floats> highest, ffi::Result<ffi::Buffer<ffi::S32>> place) {
  const auto shape = x.dimensions();
  if (shape.size() != 2 || shape[1] < 1 || (int64_t)highest->element_count() != shape[0] ||
      (int64_t)place->element_count() != shape[0])
    return wrong("jaxinfer_argmax: x must be [R, V], and what comes out [R]");
  const auto of_row = AT_LEVEL(argmax);
  Threads threads(pool);
  if (shape[0] * shape[1] < SMALL) threads.count = 1;
  threads.run({{shape[0], [&](int64_t row) {
    of_row(x.typed_data() + row * shape[1], shape[1], highest->typed_data() + row, place->typed_data() + row);
  }}});
  return ffi::Error::Success();
}
