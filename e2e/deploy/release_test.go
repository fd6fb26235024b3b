package deploy_test

import (
	"context"
	"crypto/sha256"
	"debug/buildinfo"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"slices"
	"testing"
	"time"
)

// The binary is its sources' alone: built in another directory, by another user's home, without anything compiled before, it is the
// same bit for bit, so that anybody can check a release.
func TestReproducible(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Minute)
	defer cancel()
	var sums []string
	for name, env := range map[string][]string{
		"a":                 nil,
		"another/directory": {"GOCACHE=" + t.TempDir(), "HOME=" + t.TempDir(), "USER=somebody", "TZ=Asia/Kathmandu", "LC_ALL=C"},
	} {
		dir := filepath.Join(t.TempDir(), name)
		for _, part := range []string{"Makefile", "go.mod", "go.sum", "cache", "cmd", "iptables", "proxy"} {
			if err := os.MkdirAll(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			if out, err := exec.CommandContext(ctx, "cp", "-R", filepath.Join("../..", part), dir).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
		}
		build := exec.CommandContext(ctx, "make", "--no-print-directory", "build")
		build.Dir = dir
		build.Env = append(append(os.Environ(), goEnv(t, "GOMODCACHE"), goEnv(t, "GOPROXY")), env...)
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		binary := filepath.Join(dir, "bin", "imdsgate")
		b, err := os.ReadFile(binary)
		if err != nil {
			t.Fatal(err)
		}
		sums = append(sums, fmt.Sprintf("%x", sha256.Sum256(b)))
		info, err := buildinfo.ReadFile(binary)
		if err != nil {
			t.Fatal(err)
		}
		if !slices.ContainsFunc(info.Settings, func(s debug.BuildSetting) bool { return s.Key == "-trimpath" && s.Value == "true" }) {
			t.Errorf("built without -trimpath: %v", info.Settings)
		}
	}
	if sums[0] != sums[1] {
		t.Errorf("two builds of one source differ: %v", sums)
	}
}

// goEnv is a setting that HOME would change.
func goEnv(t *testing.T, name string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "go", "env", name).Output()
	if err != nil {
		t.Fatal(err)
	}
	return name + "=" + string(out[:len(out)-1])
}
