package deploy_test

import (
	"archive/tar"
	"context"
	"crypto/x509"
	"debug/elf"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// The Dockerfile's image, as built here: small, without a shell, and with both back ends of iptables, whole, where PATH says.
func TestImage(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Minute)
	defer cancel()
	build := exec.CommandContext(ctx, "./build-image.sh")
	build.Stderr = t.Output()
	out, err := build.Output()
	if err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	config, size := unpack(t, strings.TrimSpace(string(out)), root)

	if diff := cmp.Diff(imageConfig{User: "0:0", Env: []string{"PATH=/iptables/nft:/usr/sbin:/usr/bin:/sbin:/bin"}, Entrypoint: []string{"/imdsgate"}}, config); diff != "" {
		t.Errorf("configuration (-want +got):\n%s", diff)
	}
	const mb = 1 << 20
	if size > 60*mb {
		t.Errorf("the image is %d MB unpacked, want at most 60", size/mb)
	}
	binary, err := elf.Open(filepath.Join(root, "imdsgate"))
	if err != nil {
		t.Fatal(err)
	}
	defer binary.Close()
	if slices.ContainsFunc(binary.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP }) {
		t.Error("imdsgate is not static")
	}
	for _, mode := range []string{"nft", "legacy"} {
		for _, name := range []string{"iptables", "ip6tables"} {
			for _, suffix := range []string{"", "-save", "-restore"} {
				out := inside(t, root, "/iptables/"+mode+"/"+name+suffix, "--version")
				if want := map[string]string{"nft": "nf_tables", "legacy": "legacy"}[mode]; !strings.Contains(out, want) || !strings.Contains(out, name) {
					t.Errorf("%s%s of %s is %q", name, suffix, mode, out)
				}
			}
		}
	}
	// A rule of the daemon's kind: protocol, match and target are extensions, which the program loads.
	for _, mode := range []string{"nft", "legacy"} {
		for name, to := range map[string][2]string{"iptables": {"169.254.169.254", "192.0.2.1:8254"}, "ip6tables": {"fd00:ec2::254", "[2001:db8::1]:8254"}} {
			inside(t, root, "/iptables/"+mode+"/"+name, "-t", "nat", "-A", "PREROUTING", "-d", to[0], "-p", "tcp", "--dport", "80", "-m", "addrtype", "!", "--src-type", "LOCAL", "-m", "comment", "--comment", "test", "-j", "DNAT", "--to-destination", to[1])
		}
	}
	if certs, err := os.ReadFile(filepath.Join(root, "etc/ssl/certs/ca-certificates.crt")); err != nil || !x509.NewCertPool().AppendCertsFromPEM(certs) {
		t.Errorf("no authorities to check STS with: %v", err)
	}
	if out := inside(t, root, "/imdsgate", "-version"); !strings.HasPrefix(out, "imdsgate ") {
		t.Errorf("-version says %q", out)
	}
}

type imageConfig struct {
	User            string
	Env, Entrypoint []string
}

// unpack reads a docker-archive into a directory and returns the image's configuration and its unpacked size.
func unpack(t *testing.T, archive, root string) (imageConfig, int64) {
	t.Helper()
	var manifest []struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	if err := json.Unmarshal(member(t, archive, "manifest.json"), &manifest); err != nil {
		t.Fatal(err)
	}
	if len(manifest) != 1 || !slices.Equal(manifest[0].RepoTags, []string{"test.local/imdsgate:dev"}) {
		t.Fatalf("manifest: %+v", manifest)
	}
	var config struct{ Config imageConfig }
	if err := json.Unmarshal(member(t, archive, manifest[0].Config), &config); err != nil {
		t.Fatal(err)
	}
	dir, err := os.OpenRoot(root)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	var size int64
	for _, layer := range manifest[0].Layers {
		each(t, strings.NewReader(string(member(t, archive, layer))), func(h *tar.Header, r io.Reader) {
			name := path.Clean(h.Name)
			size += h.Size
			if slices.Contains([]string{"sh", "bash", "dash", "busybox"}, path.Base(name)) && h.Typeflag != tar.TypeDir {
				t.Errorf("the image has a shell: /%s", name)
			}
			var err error
			switch h.Typeflag {
			case tar.TypeDir:
				err = dir.MkdirAll(name, 0o755)
			case tar.TypeSymlink:
				err = dir.Symlink(h.Linkname, name)
			case tar.TypeReg:
				var f *os.File
				if f, err = dir.OpenFile(name, os.O_CREATE|os.O_WRONLY, h.FileInfo().Mode().Perm()); err == nil {
					_, err = io.Copy(f, r)
					err = errors.Join(err, f.Close())
				}
			}
			if err != nil {
				t.Fatalf("unpack /%s: %v", name, err)
			}
		})
	}
	return config.Config, size
}

// member reads one file of an archive.
func member(t *testing.T, archive, name string) (content []byte) {
	t.Helper()
	f, err := os.Open(archive)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	each(t, f, func(h *tar.Header, r io.Reader) {
		if h.Name == name {
			if content, err = io.ReadAll(r); err != nil {
				t.Fatal(err)
			}
		}
	})
	if content == nil {
		t.Fatalf("%s has no %s", archive, name)
	}
	return content
}

func each(t *testing.T, archive io.Reader, do func(*tar.Header, io.Reader)) {
	t.Helper()
	for r := tar.NewReader(archive); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		do(h, r)
	}
}

// inside runs a program of the image with the image as its root, and a network namespace of its own.
func inside(t *testing.T, root, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Dir, cmd.Env = "/", []string{"PATH=/iptables/nft:/usr/sbin", "XTABLES_LOCKFILE=/lock"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root, Cloneflags: syscall.CLONE_NEWNET}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("%s %v: %v: %s", name, args, err, out)
	}
	return string(out)
}
