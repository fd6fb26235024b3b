package clients

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// client is one program of programs/ and what its AWS client can do.
type client struct {
	name string
	argv []string // relative to programs/
	v1   bool     // knows IMDSv1 only
	v6   bool     // has an IPv6 endpoint mode
	none string   // regexp: how it says that there are no credentials

	keepsToken bool // between fetches
	calls      bool // GetCallerIdentity, with CALLER_IDENTITY set
}

var clients = []client{
	{name: "awscli", argv: []string{"/usr/bin/python3", "awscli_client.py"}, v6: true, none: `Unable to retrieve credentials|Unable to locate credentials`},
	{name: "boto3", argv: []string{"/usr/bin/python3", "boto3_client.py"}, v6: true, none: `NoCredentialsError: Unable to locate credentials`},
	{name: "crt", argv: []string{"/usr/bin/python3", "crt_client.py"}, none: `AwsCrtError: AWS_\w+`},
	{name: "boto2", argv: []string{"/usr/bin/python3", "boto2_client.py"}, v1: true, none: `NoCredentials: boto found no credentials`},
	{name: "ruby", argv: []string{"/usr/bin/ruby", "ruby_client.rb"}, v6: true, none: `MissingCredentialsError`, keepsToken: true},
	{name: "js-v2", argv: []string{"node", "js/v2.js"}, v6: true, none: `EC2 Metadata|ECONNREFUSED`},
	{name: "js-v3", argv: []string{"node", "js/v3.js"}, v6: true, none: `CredentialsProviderError|ProviderError`},
	{name: "go-v1", argv: []string{goPrograms, "go-v1"}, v6: true, none: `EC2RoleRequestError: no EC2 instance role found`, keepsToken: true},
	{name: "go-v2", argv: []string{goPrograms, "go-v2"}, v6: true, none: `no EC2 IMDS role found`, keepsToken: true, calls: true},
	{name: "minio-go", argv: []string{goPrograms, "minio-go"}, v6: true, none: `minio-go: `},
}

// goPrograms stands for the program built from programs/go.
const goPrograms = "@go"

// programs builds the Go clients, checks that everything else is installed, and returns every
// client's absolute command line.
func programs(t *testing.T) map[string][]string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("client tests make network namespaces: run as root")
	}
	dir, err := filepath.Abs("programs")
	if err != nil {
		t.Fatal(err)
	}
	bin := filepath.Join(t.TempDir(), "clients")
	build := exec.Command("go", "build", "-o", bin, ".")
	build.Dir = filepath.Join(dir, "go")
	build.Env = append(os.Environ(), "GOWORK=off")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build programs/go: %v\n%s", err, out)
	}
	for _, need := range []string{
		"/usr/bin/aws", "/usr/bin/python3", "/usr/bin/ruby",
		"/usr/lib/python3/dist-packages/boto3", "/usr/lib/python3/dist-packages/awscrt", "/usr/lib/python3/dist-packages/boto",
		dir + "/js/node_modules/aws-sdk", dir + "/js/node_modules/@smithy/credential-provider-imds",
	} {
		if _, err := os.Stat(need); err != nil {
			t.Fatalf("%v; run e2e/clients/install.sh", err)
		}
	}
	node, err := exec.LookPath("node")
	if err != nil {
		t.Fatalf("%v; run e2e/clients/install.sh", err)
	}
	argv := map[string][]string{}
	for _, c := range clients {
		a := append([]string(nil), c.argv...)
		switch a[0] {
		case goPrograms:
			a[0] = bin
		case "node":
			a[0] = node
			a[1] = filepath.Join(dir, a[1])
		default:
			a[1] = filepath.Join(dir, a[1])
		}
		argv[c.name] = a
	}
	return argv
}
