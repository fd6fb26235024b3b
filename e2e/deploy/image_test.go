package deploy_test

import (
	"archive/tar"
	"context"
	"crypto/x509"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// The Dockerfile's image for this machine and for the other architecture: small, without a shell, and with both back ends of
// iptables, whole, where PATH says. QEMU runs the other one's programs; it has no netlink of nftables, so what talks to the
// kernel is tried on this machine's own.
func TestImage(t *testing.T) {
	for arch, machine := range map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64} {
		t.Run(arch, func(t *testing.T) { testImage(t, arch, machine) })
	}
}

func testImage(t *testing.T, arch string, machine elf.Machine) {
	archive := script(t, "./build-image.sh", arch)
	im := image{root: t.TempDir()}
	config, size := im.unpack(t, archive)
	native := arch == runtime.GOARCH
	if !native {
		qemu, err := os.ReadFile(script(t, "./qemu.sh", arch))
		if err != nil {
			t.Fatal(err)
		}
		im.qemu = "/qemu"
		if err := os.WriteFile(filepath.Join(im.root, im.qemu), qemu, 0o755); err != nil {
			t.Fatal(err)
		}
	}

	want := imageConfig{Architecture: arch}
	want.Config.User, want.Config.Env, want.Config.Entrypoint = "0:0", []string{"PATH=/iptables/nft:/usr/sbin:/usr/bin:/sbin:/bin"}, []string{"/imdsgate"}
	if diff := cmp.Diff(want, config); diff != "" {
		t.Errorf("configuration (-want +got):\n%s", diff)
	}
	const mb = 1 << 20
	if size > 60*mb {
		t.Errorf("the image is %d MB unpacked, want at most 60", size/mb)
	}
	im.checkPrograms(t, machine)

	modes := map[string]string{"nft": "nf_tables", "legacy": "legacy"}
	for mode, word := range modes {
		for _, name := range []string{"iptables", "ip6tables"} {
			for _, suffix := range []string{"", "-save", "-restore"} {
				if mode == "nft" && suffix == "" && !native {
					continue // asks the kernel first
				}
				out := im.run(t, "/iptables/"+mode+"/"+name+suffix, "--version")
				if !strings.Contains(out, word) || !strings.Contains(out, name+suffix) {
					t.Errorf("%s%s of %s is %q", name, suffix, mode, out)
				}
				// Whichever PATH offers, a cleanup finds both by these names.
				if out := im.run(t, "/usr/sbin/"+name+"-"+mode+suffix, "--version"); !strings.Contains(out, word) {
					t.Errorf("%s-%s%s is %q", name, mode, suffix, out)
				}
			}
		}
	}
	// A rule of the daemon's kind: protocol, match and target are extensions, which the program loads.
	if native {
		for name, to := range map[string][2]string{"iptables": {"169.254.169.254", "192.0.2.1:8254"}, "ip6tables": {"fd00:ec2::254", "[2001:db8::1]:8254"}} {
			for mode := range modes {
				im.run(t, "/iptables/"+mode+"/"+name, "-t", "nat", "-A", "PREROUTING", "-d", to[0], "-p", "tcp", "--dport", "80", "-m", "addrtype", "!", "--src-type", "LOCAL", "-m", "comment", "--comment", "test", "-j", "DNAT", "--to-destination", to[1])
			}
		}
	} else {
		help := im.run(t, "/iptables/legacy/iptables", "-p", "tcp", "-m", "tcp", "-m", "addrtype", "-m", "comment", "-j", "DNAT", "--help")
		for _, option := range []string{"--dport", "--src-type", "--comment", "--to-destination"} {
			if !strings.Contains(help, option) {
				t.Errorf("iptables does not know %s:\n%s", option, help)
			}
		}
	}
	if certs, err := os.ReadFile(filepath.Join(im.root, "etc/ssl/certs/ca-certificates.crt")); err != nil || !x509.NewCertPool().AppendCertsFromPEM(certs) {
		t.Errorf("no authorities to check STS with: %v", err)
	}
	// What others want to go with their works, and what scanners want to know.
	for file, word := range map[string]string{
		"usr/share/doc/imdsgate/LICENSE": "Apache License", "usr/share/doc/imdsgate/THIRD_PARTY_LICENSES": "The programs imdsgate and imdsgate-load are linked with",
		"usr/share/doc/iptables/copyright": "GPL-2", "usr/share/doc/libc6/copyright": "LGPL", "usr/share/common-licenses/GPL-2": "Version 2, June 1991",
		"var/lib/dpkg/status.d/iptables": "\nArchitecture: " + arch + "\n", "var/lib/dpkg/status.d/libc6": "\nVersion: ", "usr/lib/os-release": "ID=debian",
	} {
		if text, err := os.ReadFile(filepath.Join(im.root, file)); err != nil || !strings.Contains(string(text), word) {
			t.Errorf("/%s: %v, want it with %q", file, err, word)
		}
	}
	if out := im.run(t, "/imdsgate", "-version"); !strings.HasPrefix(out, "imdsgate ") {
		t.Errorf("-version says %q", out)
	}
	if out := im.run(t, "/imdsgate-load", "-help"); !strings.Contains(out, "-sequence") {
		t.Errorf("imdsgate-load -help says %q", out)
	}
}

// script runs one and returns what it prints.
func script(t *testing.T, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stderr = t.Output()
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

// image is one that is unpacked in the directory root.
type image struct {
	root string
	qemu string // in it, for another architecture
}

// checkPrograms looks at every file that may be run or loaded: it is of the machine, and the libraries that it names are there.
// Only iptables is linked to any.
func (im image) checkPrograms(t *testing.T, machine elf.Machine) {
	t.Helper()
	needed, found := map[string][]string{}, map[string]bool{}
	err := filepath.WalkDir(im.root, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		found[d.Name()] = true
		if !d.Type().IsRegular() || name == filepath.Join(im.root, im.qemu) {
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if info.Mode()&0o111 == 0 && !strings.Contains(d.Name(), ".so") {
			return nil
		}
		f, err := elf.Open(name)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		defer f.Close()
		if f.Machine != machine {
			t.Errorf("%s is for %s, want %s", name, f.Machine, machine)
		}
		libraries, err := f.ImportedLibraries()
		for _, library := range libraries {
			needed[library] = append(needed[library], name)
		}
		if linked := slices.ContainsFunc(f.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP }); linked && strings.HasPrefix(d.Name(), "imdsgate") {
			t.Errorf("%s is not static", d.Name())
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	if len(needed) < 5 {
		t.Errorf("the programs need %v", slices.Collect(maps.Keys(needed)))
	}
	for library, users := range needed {
		if !found[library] {
			t.Errorf("%s needs %s, which is missing", users[0], library)
		}
	}
}

type imageConfig struct {
	Architecture string
	Config       struct {
		User            string
		Env, Entrypoint []string
	}
}

// unpack reads a docker-archive into the directory and returns the image's configuration and its unpacked size.
func (im image) unpack(t *testing.T, archive string) (imageConfig, int64) {
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
	var config imageConfig
	if err := json.Unmarshal(member(t, archive, manifest[0].Config), &config); err != nil {
		t.Fatal(err)
	}
	dir, err := os.OpenRoot(im.root)
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
	return config, size
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

// run runs a program of the image with the image as its root, and a network namespace of its own.
func (im image) run(t *testing.T, name string, args ...string) string {
	t.Helper()
	if im.qemu != "" {
		name, args = im.qemu, append([]string{"-0", path.Base(name), name}, args...)
	}
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Dir, cmd.Env = "/", []string{"PATH=/iptables/nft:/usr/sbin", "XTABLES_LOCKFILE=/lock"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: im.root, Cloneflags: syscall.CLONE_NEWNET}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("%s %v: %v: %s", name, args, err, out)
	}
	return string(out)
}
