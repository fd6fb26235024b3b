//go:build tools

package server

import _ "github.com/minio/minio"
