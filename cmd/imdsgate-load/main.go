// Command imdsgate-load asks the metadata endpoint for credentials, as many pods would, and tells how long the answers took. It
// runs in a pod. It never prints credentials. docs/load.md says how to read what it prints.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := exitCode(run(ctx, os.Args[1:], os.Stdout), os.Stderr)
	stop()
	os.Exit(code)
}
