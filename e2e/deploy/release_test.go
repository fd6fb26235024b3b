package deploy_test

import (
	"context"
	"crypto/sha256"
	"debug/buildinfo"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
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

// The part of a release that needs neither a registry nor a signature, on a tag of a clone.
func TestRelease(t *testing.T) {
	const version, image, digest = "0.99.9-rc.1", "registry.test/imdsgate", "sha256:0123456789012345678901234567890123456789012345678901234567890123"
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	dir, dist := filepath.Join(t.TempDir(), "clone"), t.TempDir()
	run := func(name string, args ...string) (string, error) {
		cmd := exec.CommandContext(ctx, name, args...)
		cmd.Dir = dir
		cache, err := os.UserCacheDir()
		if err != nil {
			t.Fatal(err)
		}
		cmd.Env = append(os.Environ(), "ARCHES="+runtime.GOARCH, "PATH="+filepath.Join(cache, "imdsgate-e2e", "bin")+":"+os.Getenv("PATH"),
			"GIT_AUTHOR_NAME=test", "GIT_AUTHOR_EMAIL=test@test.local", "GIT_COMMITTER_NAME=test", "GIT_COMMITTER_EMAIL=test@test.local")
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	must := func(name string, args ...string) string {
		t.Helper()
		out, err := run(name, args...)
		if err != nil {
			t.Fatalf("%s %v: %v: %s", name, args, err, out)
		}
		return out
	}
	refused := func(why, name string, args ...string) {
		t.Helper()
		if out, err := run(name, args...); err == nil || !strings.Contains(out, why) {
			t.Errorf("%s %v: %v: %s, want a refusal with %q", name, args, err, out, why)
		}
	}
	top, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(ctx, "git", "clone", "--quiet", "file://"+top, dir).CombinedOutput(); err != nil {
		t.Fatalf("git clone: %v: %s (apt-get install git)", err, out)
	}
	changelog := filepath.Join(dir, "CHANGELOG.md")
	text, err := os.ReadFile(changelog)
	if err != nil {
		t.Fatal(err)
	}
	text = append([]byte("# Changelog\n\n## "+version+" / 2026-01-02\n\n* [FEATURE] Of the test.\n\n## 0.99.8 / 2026-01-01\n\n* Older.\n\n"), text...)
	if err := os.WriteFile(changelog, text, 0o644); err != nil {
		t.Fatal(err)
	}
	must("cp", filepath.Join(top, ".github", "release"), ".github/release")
	must("git", "add", "-A")
	must("git", "commit", "--quiet", "-m", "release")
	must("git", "tag", "v"+version)

	const script = ".github/release"
	for tag, want := range map[string]string{"v1.2.3": "1.2.3", "v0.10.0": "0.10.0", "v" + version: version} {
		if got := must(script, "version", tag); got != want+"\n" {
			t.Errorf("the version of %s is %q", tag, got)
		}
	}
	for _, tag := range []string{"1.2.3", "v1.2", "v01.2.3", "v1.2.3+x", "v1.2.3-", "v1.2.3 ", "v1.2.3;id", "latest", ""} {
		refused("is no semantic version", script, "version", tag)
	}
	if got := must(script, "notes", version); got != "\n* [FEATURE] Of the test.\n" {
		t.Errorf("notes: %q", got)
	}
	refused("no section", script, "notes", "0.99.7")

	must(script, "chart", version, image, digest, dist)
	refused("is no digest", script, "chart", version, image, "latest", dist)
	shown, _, err := helm(t, "show", "chart", filepath.Join(dist, "imdsgate-"+version+".tgz"))
	if err != nil {
		t.Fatal(err)
	}
	for file, want := range map[string]string{
		shown: "version: " + version,
		must("cat", filepath.Join(dist, "imdsgate.yaml")): "image: " + image + "@" + digest,
	} {
		if !strings.Contains(file, want) {
			t.Errorf("no %q in:\n%.600s", want, file)
		}
	}

	must(script, "binaries", version, dist)
	archive := filepath.Join(dist, "imdsgate_"+version+"_linux_"+runtime.GOARCH+".tar.gz")
	if got := strings.Fields(must("tar", "-tzf", archive)); !slices.Equal(got, []string{"imdsgate", "LICENSE", "THIRD_PARTY_LICENSES"}) {
		t.Errorf("the archive holds %v", got)
	}
	out := t.TempDir()
	must("tar", "-C", out, "-xzf", archive)
	if got := must(filepath.Join(out, "imdsgate"), "-version"); got != "imdsgate v"+version+"\n" {
		t.Errorf("-version says %q", got)
	}
	must(script, "sums", dist)
	if got := must("sh", "-c", `cd "$1" && sha256sum -c SHA256SUMS`, "sh", dist); strings.Count(got, ": OK") != 3 {
		t.Errorf("sums: %s", got)
	}
	must("touch", "left-over")
	refused("build in a clean checkout of the tag", script, "binaries", version, dist)
}
