package e2e_test

import (
	"bufio"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/e2e/imds"
	"github.com/imdsgate/imdsgate/e2e/lab"
	"github.com/imdsgate/imdsgate/e2e/labtest"
)

// A container runtime that hangs reads no log, and the pipe to it is full. Pods are served and refused as before, and once somebody
// reads, nothing of it is missing.
func TestLabLogNobodyReads(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t)
	n := labtest.Node(t, shared, lab.NodeOptions{})
	path := filepath.Join(n.Dir(), "log")
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	pipe, err := os.OpenFile(path, os.O_RDWR|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer pipe.Close()
	const filler = "nobody reads this\n"
	for err == nil {
		_ = pipe.SetWriteDeadline(time.Now().Add(10 * time.Millisecond))
		_, err = pipe.WriteString(filler)
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal(err)
	}
	d := labtest.Launch(t, n, lab.DaemonOptions{
		Flags: []string{"-issuer", "web-identity"}, Wrap: []string{"sh", "-c", `log=$0; exec "$@" 2>"$log"`, path},
	})
	if err := d.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	shop := shared.Unique("shop")
	role := serviceAccount(t, n, shop, "cart", "cart")
	p, other := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "cart"}), labtest.Pod(t, n, lab.PodSpec{Namespace: shop})
	served(t, n, p, role)
	if err := wantStatus(other, roleList, http.StatusNotFound); err != nil {
		t.Error(err)
	}

	_ = pipe.SetReadDeadline(time.Now().Add(20 * time.Second))
	lines := bufio.NewScanner(pipe)
	for _, want := range []string{`"msg":"pods synced"`, `"msg":"session issued"`, `"msg":"session handed out"`, `"result":"no_role"`} {
		for !strings.Contains(lines.Text(), want) {
			if !lines.Scan() {
				t.Fatalf("the log ends before %s: %v", want, lines.Err())
			}
		}
	}
	labtest.Untouched(t, n, imds.Expected{})
}
