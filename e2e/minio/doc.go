// Package minio runs imdsgate once against a server that nobody here wrote: MinIO as STS and as S3,
// with -issuer web-identity and the API server as MinIO's OpenID provider. Its test has the build
// tag minio, because the server takes ten minutes to build: `make test-minio` does both.
package minio
