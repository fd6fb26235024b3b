package main

import (
	"fmt"
	"net/http"
	"os"
	"strings"

	mcreds "github.com/minio/minio-go/v7/pkg/credentials"
)

// minio is minio-go's instance role, which asks for a new token at each fetch. It knows no endpoint
// mode: a user of IPv6 names the endpoint.
func minio() (fetch, error) {
	endpoint := ""
	if strings.EqualFold(os.Getenv("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE"), "IPv6") {
		endpoint = "http://[fd00:ec2::254]"
	}
	creds := mcreds.NewIAM(endpoint)
	client := &mcreds.CredContext{Client: http.DefaultClient}
	return func() (credentials, error) {
		creds.Expire()
		v, err := creds.GetWithContext(client)
		if err != nil {
			return credentials{}, fmt.Errorf("minio-go: %w", err)
		}
		return credentials{accessKeyID: v.AccessKeyID, expiration: v.Expiration}, nil
	}, nil
}
