/* What a shared libkvmix shows: it is built with hidden symbols, and KVMIX_API makes the public ones visible. It stands in
 * front of a C function; between `namespace` and the name it takes in all that this block declares. */
#ifndef KVMIX_EXPORT_H_
#define KVMIX_EXPORT_H_

#ifdef __cplusplus
#define KVMIX_API [[gnu::visibility("default")]]
#define KVMIX_HIDDEN [[gnu::visibility("hidden")]] /* a private part of a public class */
#else
#define KVMIX_API __attribute__((visibility("default")))
#endif

#endif /* KVMIX_EXPORT_H_ */
